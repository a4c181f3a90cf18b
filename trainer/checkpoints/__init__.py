"""Commits of sharded state: written in the background, found, resized."""
