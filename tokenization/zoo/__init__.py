"""Zoos: a folder of checkpoints of one structure with a manifest, collected here or adopted where they lie.

``importing`` makes one of a user's own checkpoints, ``metadata_table`` reads what is known of them, ``cache`` keeps
what is computed once of a zoo.
"""
