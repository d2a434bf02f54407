"""What is read off a prompt before anything is learned: n-grams, hand features, token vectors."""
