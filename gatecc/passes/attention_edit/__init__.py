"""AttentionEdit: changes of the scores, the weights or the keys and values of attention, one file for each edit."""
