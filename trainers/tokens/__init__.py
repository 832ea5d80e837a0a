"""Statistics of token norms: exact on a fixed probe batch, as mergeable histograms on the training stream."""
