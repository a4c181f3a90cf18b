"""The mathematics of an audit: bound, canaries, attack figures."""
