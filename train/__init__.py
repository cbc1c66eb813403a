"""What both training stages share."""
