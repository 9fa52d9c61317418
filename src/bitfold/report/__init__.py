"""What a person looks at: descriptions of models, tables in the terminal."""
