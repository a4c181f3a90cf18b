"""Every setting, one file a group."""
