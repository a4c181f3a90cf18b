"""What becomes of a round's updates; one file a rule."""
