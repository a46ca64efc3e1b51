"""`zppo evaluate --suite`: a served model, a gateway before it, and harnesses that ask through
it."""
