"""What reduce-depth does to a graph: which layers to take out, taking them out, making up for them."""
