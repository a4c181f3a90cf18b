"""What left a silo in its rounds, kept for its own steward."""
