"""From a schedule to epsilon."""
