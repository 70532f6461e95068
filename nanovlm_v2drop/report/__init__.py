"""What a run leaves to look at: tables on screen, pictures of the vision tokens that were kept, and a page."""
