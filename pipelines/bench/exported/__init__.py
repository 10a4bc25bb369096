"""What exported models cost where they are used."""
