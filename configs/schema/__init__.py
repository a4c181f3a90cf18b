"""Every setting: one file per group of settings."""
