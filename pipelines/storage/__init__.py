"""Bytes on disks, object stores and web servers: URLs, retries, caches, unfinished files."""
