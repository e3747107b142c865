"""The mathematics of policy optimisation: advantages, losses, KL, log-probabilities; pure functions of tensors."""
