"""What a configuration will need, before anything is trained."""
