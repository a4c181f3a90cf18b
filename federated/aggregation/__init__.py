"""How a round's updates are aggregated: one file per rule."""
