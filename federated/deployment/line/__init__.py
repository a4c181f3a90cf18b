"""The way from a site to the coordinator: through its HTTP proxy where it has one, and looked at before use."""
