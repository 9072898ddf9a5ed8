"""Other people's machines: finediff.integrations.skfolio (priors and covariances for its optimisers)."""
