"""Memberwise: train and run many PyTorch models as one."""
