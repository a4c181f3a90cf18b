"""What a silo's steward is shown: read from its own files, none of which is changed or held."""
