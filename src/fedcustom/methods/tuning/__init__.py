"""The five verbs as implemented for all methods that train tensors, with head fitting and cohort training."""
