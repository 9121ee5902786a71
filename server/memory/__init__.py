"""Shared memory that clients register: of the system and of GPUs."""
