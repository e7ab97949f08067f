"""Code that tests share: models, ways to compile, oracles, and programs that run in processes of their own."""
