"""STA in a model: what a backbone declares, where its blocks are, the hooks, and what the user holds of them."""
