"""Measurements that need a GPU: each one command that needs torch alone and ends within ten minutes."""
