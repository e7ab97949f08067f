"""Batching rules: for every family of ops, where its result holds the samples of the batch, given where its operands hold them.

`registry` is the table from op to rule. An op without a rule is blocked: it runs on the whole batch.
"""
