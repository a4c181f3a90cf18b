"""Mandates of studies: the steward's files, and whether one of them covers a request."""
