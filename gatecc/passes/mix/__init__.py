"""Mix: another token mixer in the place of softmax attention or of an RNN, and what belongs to that alone."""
