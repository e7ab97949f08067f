"""What tests share: models, ways to compile, oracles, children that run in processes of their own."""
