"""What a trained model is worth on held-out documents, and a prepared set as a person sees it."""
