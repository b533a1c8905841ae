"""What a training step costs, with Memberwise and with everything else: see README.md."""
