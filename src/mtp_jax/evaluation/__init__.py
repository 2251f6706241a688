"""What a trained model is worth on held-out documents, and what a prepared set shows it."""
