"""Noise that several silos make together: their shares, how they travel as integers, and what their sum guarantees."""
