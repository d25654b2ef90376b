"""The gate `interface`, in full: every public entrance of the port against the reference.

`table` lists the entrances, each with transformers' counterpart and the function that checks it;
`models` has the small models on which they are checked.
"""
