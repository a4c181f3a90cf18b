"""Records that a trained model writes: drawn, filtered, and each of them once."""
