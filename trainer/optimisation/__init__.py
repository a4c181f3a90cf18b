"""A trained model made smaller, and what that is measured by."""
