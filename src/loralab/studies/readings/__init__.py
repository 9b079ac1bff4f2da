"""What can be read off the records of a question: findings, tables, sentences."""
