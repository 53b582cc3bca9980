"""autograd Functions: what is saved between the forward op and the backward op of each loss."""
