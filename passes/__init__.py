"""One room per step from a model to its rewritten form: capture, detect, lift, verify, rewrite."""
