"""What any program needs: errors, text, files, locks, progress, status. Uses no other room."""
