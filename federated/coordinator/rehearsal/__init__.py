"""Asks the silos whether a run would work, and says what has to be mended before one is started."""
