"""Lab: hyper-representations (`model.kind: sane`)."""
