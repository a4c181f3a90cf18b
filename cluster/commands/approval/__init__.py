"""Commands for who has to approve that a model leaves."""
