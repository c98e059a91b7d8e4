"""Cases to a store of prepared volumes, and random crops of them."""
