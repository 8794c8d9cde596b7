"""What a network call keeps and recomputes under a byte budget: plans, recomputed blocks, live bytes."""
