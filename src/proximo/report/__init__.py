"""What a run did: pictures, a diagnosis in words, a written report, and videos."""
