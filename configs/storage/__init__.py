"""Durable storage: atomic files, manifests, commits, folders and buckets, encryption."""
