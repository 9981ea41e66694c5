"""What several tests need: tiny models, and runs of them."""
