"""What the user wrote, typed; every mistake is one sentence. Knows no model and no machine."""
