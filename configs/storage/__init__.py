"""How bytes last: atomic files, manifests, commits, folders and buckets, sealing."""
